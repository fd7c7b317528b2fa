"""``python -m quantize``: the command ``nvfp4-moe``."""

from quantize.cli import main

if __name__ == "__main__":
    main()
