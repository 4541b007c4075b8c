"""The six methods that the paper compares itself with (Fig. 3, Tables 3 and 7), one file each.

Importing this adds them to BACKBONES, so that `--backbone` takes them beside the paper's three.
"""

from backbones import BACKBONES
from rivals.cocoop import CoCoOp
from rivals.coprompt import CoPrompt
from rivals.dept import DePT
from rivals.kgcoop import KgCoOp
from rivals.proda import ProDA
from rivals.tcp import TCP

RIVALS = {"cocoop": CoCoOp, "kgcoop": KgCoOp, "proda": ProDA, "tcp": TCP, "dept": DePT, "coprompt": CoPrompt}
BACKBONES.update(RIVALS)
