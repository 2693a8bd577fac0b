"""The one trainer: operators learnt by gradient descent while the model around them stays frozen.

A method hands over an `Objective` (its parameters, what they do to an activation, which runs a row
of the contrast asks for, and the loss of these), the texts and `Training` settings; `train` gives
back parameters and what is told of how they were found.
"""

from trimtab.training.objective import Objective, Outcome, Run, Steered
from trimtab.training.settings import Training
from trimtab.training.sizes import typical_size
from trimtab.training.texts import Text, Texts, numbered, positive_texts, texts_of
from trimtab.training.trainer import Trained, train
