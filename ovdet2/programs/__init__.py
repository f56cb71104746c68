"""The programs, each runnable as ``python -m ovdet2.programs.<name>``; the scripts of tools/ and train_net.py call them."""
