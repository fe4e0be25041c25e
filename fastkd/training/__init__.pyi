"""The modules that `__init__.py` loads when they are named."""

from fastkd.training import adapters as adapters
from fastkd.training import arguments as arguments
from fastkd.training import caching as caching
from fastkd.training import checks as checks
from fastkd.training import data as data
from fastkd.training import evaluation as evaluation
from fastkd.training import fit as fit
from fastkd.training import joining as joining
from fastkd.training import judge as judge
from fastkd.training import launcher as launcher
from fastkd.training import lessons as lessons
from fastkd.training import loading as loading
from fastkd.training import machine as machine
from fastkd.training import places as places
from fastkd.training import plots as plots
from fastkd.training import precision as precision
from fastkd.training import report as report
from fastkd.training import run as run
from fastkd.training import samples as samples
from fastkd.training import setup as setup
from fastkd.training import sharding as sharding
from fastkd.training import teaching as teaching
from fastkd.training import teaching_checks as teaching_checks
from fastkd.training import whole as whole
