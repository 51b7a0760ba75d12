"""``python -m minivllm`` is ``mini-vllm``."""

import sys

from minivllm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
