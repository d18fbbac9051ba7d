"""What benchmarks print besides their own figures."""

from mimscale.files.measurement import commit as commit
from mimscale.files.measurement import origin as origin
from mimscale.files.measurement import processor as processor
from mimscale.files.measurement import table as table
