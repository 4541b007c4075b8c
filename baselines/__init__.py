"""What the paper, or its readers, compare MAO with: six prompt learners (Fig. 3, Tables 3 and 7), one file each, and
other samplers and labelers than the paper's."""

from baselines.cocoop import CoCoOp
from baselines.coprompt import CoPrompt
from baselines.dept import DePT
from baselines.kgcoop import KgCoOp
from baselines.proda import ProDA
from baselines.tcp import TCP

BASELINES = {"cocoop": CoCoOp, "kgcoop": KgCoOp, "proda": ProDA, "tcp": TCP, "dept": DePT, "coprompt": CoPrompt}
