"""A model behind OpenAI's API, each answer under steerings of its own"""

from trimtab.serving.adapters import Adapters
from trimtab.serving.answering import Desk
from trimtab.serving.api import Access, application, host_name
from trimtab.serving.batch import VLLM
from trimtab.serving.carrying import Adapted
from trimtab.serving.choosing import Chooser, Chosen, Settings
from trimtab.serving.elsewhere import Elsewhere
from trimtab.serving.engine import Engine
from trimtab.serving.inside import Carried, Inside, sites_wanted
from trimtab.serving.jobs import Limits
from trimtab.serving.library import LARGEST, Library, described
from trimtab.serving.names import Asked, check_name
from trimtab.serving.sizes import limited, refused_length, room
from trimtab.serving.stock import STOCK, flags_of
from trimtab.serving.stock_inside import STOCK_INSIDE, inside_flags
