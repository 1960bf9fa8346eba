"""`python -m trimtab` is the command `trimtab`."""

from .cli import main

if __name__ == "__main__":
    main()
