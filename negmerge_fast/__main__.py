"""python -m negmerge_fast"""

from .cli import main

if __name__ == "__main__":
    main()
