"""`python -m fedmira` is the command `fedmira`."""

from fedmira.cli.main import main

if __name__ == "__main__":
    main()
