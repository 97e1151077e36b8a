"""`python -m surgery` is the `surgery` command."""

from surgery.cli.app import main

if __name__ == "__main__":
    main()
