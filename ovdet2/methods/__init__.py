"""The methods included in ovdet2, one directory each."""
