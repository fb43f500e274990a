"""Images + captions -> training records, from a checkout: `python data2rec.py --help`. Installed: `rwkv-clip-data`."""

import sys

from rwkv_clip.data.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
