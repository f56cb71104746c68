"""The methods that come with ovdet2, one directory each."""
