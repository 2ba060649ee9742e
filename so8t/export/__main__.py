"""python -m so8t.export"""

import sys

from so8t.export.command import main

sys.exit(main())
