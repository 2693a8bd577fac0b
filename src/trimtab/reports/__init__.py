"""The directory of a run, its page, its pictures, and how results show themselves.

Names are loaded when they are asked for: of what only makes tables nobody waits for matplotlib.
"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
