"""`python -m fedmira` is the command `fedmira`."""

from fedmira.cli import main

if __name__ == "__main__":
    main()
