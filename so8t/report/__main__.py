"""python -m so8t.report"""

import sys

from so8t.report.command import main

sys.exit(main())
