"""python -m so8t.serve"""

import sys

from so8t.serve.command import main

sys.exit(main())
