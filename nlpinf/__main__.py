"""`python -m nlpinf`."""

from nlpinf.cli import main

if __name__ == "__main__":
    main()
