"""Time and memory of F-VLM's training steps, trunk frozen or trained. See ``ovdet2 bench fvlm --help``."""

from ovdet2.methods.fvlm.bench import main

if __name__ == "__main__":
    main()
