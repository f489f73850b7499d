"""`python -m vmitap` is the `vmitap` command."""

from vmitap.cli import main

if __name__ == "__main__":
    main()
