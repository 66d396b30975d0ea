"""Tables of numbers: read, check, standardize and split them."""

from jcnf.data.tables.files import load_arrays as load_arrays
from jcnf.data.tables.files import read_raw as read_raw
from jcnf.data.tables.files import write_rows as write_rows
from jcnf.data.tables.levels import Levels as Levels
from jcnf.data.tables.levels import jitter as jitter
from jcnf.data.tables.levels import resolutions as resolutions
from jcnf.data.tables.maf_suite import MAF_SUITE as MAF_SUITE
from jcnf.data.tables.maf_suite import load_maf_suite as load_maf_suite
from jcnf.data.tables.table import Standardizer as Standardizer
from jcnf.data.tables.table import Table as Table
from jcnf.data.tables.table import load_table as load_table
from jcnf.data.tables.table import read_rows as read_rows
