"""python -m so8t.memory"""

import sys

from so8t.memory.command import main

sys.exit(main())
