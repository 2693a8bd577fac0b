"""The algebra: what a steering does to an activation, and how that folds into weights.

An operator acts on the units (the last dimension) of an activation x with one number, the dial d.
One that is affine in x at a fixed dial, x -> A x + c, is `linear`: it folds exactly into a linear
map that writes the activation (A W, A b + c) or into one that reads it (W A, b + W c).

    Scale   x_i <- (1 + d g_i) x_i            chosen units, gain g         (AUSteer, SADI)
    Shift   x_i <- x_i + d ((w_i - 1) x_i + b_i)   chosen units            (Linear-AcT, Mean-AcT)
    Add     x   <- x + d v                    also with the norm kept      (CAA, ActAdd, ITI, STA)
    Ablate  x   <- x - d R'R x                orthonormal rows R           (directional ablation)
    Affine  x   <- x + d (U V'x + c)          of rank k                    (LoReFT, AlphaSteer)
    Clamp   x   <- x + d (clip(p) - p) v      p = v'x, v of length 1       (activation capping)
    Respond x   <- x + d max(0, a'x + b) v                                 (PSR)
    Rotate  x   <- x - Px + U R_d U'x         in a plane U = [b1 b2]       (Selective Steering)
    Turn    x   <- x - Px + |Px| U (cos d, sin d)'                         (SAS and AAS)
    SetFeatures  x <- x + sum_i (f'_i - f_i(x)) d_i     features of an autoencoder   (SAE)
    Force   a router's logits so that it chooses some experts, and never others    (SteerMoE)

where P = U U' and R_d turns by d degrees from b1 toward b2. No d x d matrix is ever formed. Linear
are all but Turn, Respond, SetFeatures, Force, Scale of |x|, Shift with an interval, Add that keeps
the norm, and Clamp with one bound or two that differ. At dial 0 all but Turn and SetFeatures that
clamps do nothing, to the bit.

A dial is a number, or a tensor that broadcasts against x without its last dimension: [rows, 1] for
one dial per row of x [rows, tokens, units]. Arithmetic runs in float32 or better and is cast back.
Derivatives with respect to a dial go through.
"""

from trimtab.steering.operators.adding import Add
from trimtab.steering.operators.base import (
    CAME_LATER,
    LEFT_OUT,
    WIDEST,
    LinearDefaults,
    LinearOperator,
    Operator,
    OperatorDefaults,
    orthonormal,
)
from trimtab.steering.operators.bounds import Clamp
from trimtab.steering.operators.diagonal import Scale, Shift
from trimtab.steering.operators.features import FeatureMode, SetFeatures
from trimtab.steering.operators.kinds import (
    OPERATORS,
    apply,
    fold_input,
    fold_output,
    from_tensors,
    to_tensors,
)
from trimtab.steering.operators.low_rank import Ablate, Affine
from trimtab.steering.operators.planes import Rotate, Turn
from trimtab.steering.operators.responding import Respond
from trimtab.steering.operators.routing import Force
