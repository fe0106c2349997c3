"""`python -m dynlora_cli` is the same as `dynlora`."""

from dynlora_cli.cli.app import main

if __name__ == "__main__":
    main()
