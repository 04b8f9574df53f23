"""`python -m haast`: what launchers start."""

from haast.cli import main

if __name__ == "__main__":
    main()
