"""The artifact and its algebra: operators, interventions, one dial, calibration."""

from trimtab.steering.artifact import Steering, Steerings, no_steering, together
from trimtab.steering.calibration import STRENGTHS, Calibration
from trimtab.steering.document import kind_of_file, refuse_other_file
from trimtab.steering.gate_document import GateKind, GateScore, GateSide
from trimtab.steering.gate_reading import read_gate
from trimtab.steering.gates import (
    READS_ALL_BUT_FIRST,
    READS_LAST,
    Condition,
    Gate,
    check_gate,
    reads_below,
)
from trimtab.steering.operators import (
    Ablate,
    Add,
    Affine,
    Clamp,
    FeatureMode,
    Force,
    LinearDefaults,
    LinearOperator,
    Operator,
    OperatorDefaults,
    Respond,
    Rotate,
    Scale,
    SetFeatures,
    Shift,
    Turn,
    fold_input,
    fold_output,
    orthonormal,
    to_tensors,
)
from trimtab.steering.parts import Dial, Intervention, ModelIdentity, as_number
from trimtab.steering.scope import POSITIONS, Place, Positions, Scope, Tokens
from trimtab.steering.scope_tree import (
    ROLES,
    WORDS,
    And,
    Between,
    Mark,
    Not,
    Or,
    Part,
    Situation,
    TokenIs,
    Window,
    Word,
    parts_of,
)
from trimtab.steering.tables import chosen, operators_in_words, steered_blocks
