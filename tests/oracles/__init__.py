"""Independent statements of published networks in plain torch. They import nothing of ovdet2."""
