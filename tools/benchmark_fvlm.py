"""The same as ``ovdet2 bench fvlm``: time and memory of F-VLM's training steps, trunk frozen or trained."""

from ovdet2.methods.fvlm.bench import main

if __name__ == "__main__":
    main()
