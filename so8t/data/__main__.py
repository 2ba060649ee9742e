"""python -m so8t.data"""

import sys

from so8t.data.command import main

sys.exit(main())
