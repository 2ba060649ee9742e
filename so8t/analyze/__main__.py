"""python -m so8t.analyze"""

import sys

from so8t.analyze.command import main

sys.exit(main())
