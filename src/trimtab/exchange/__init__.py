"""A steering in other tools' formats: what each carries exactly, and what it cannot."""

from trimtab.exchange.audited import Audit
from trimtab.exchange.auditing import audit
from trimtab.exchange.card import About, base_model_of, is_control_vector, lora_rank, write_card
from trimtab.exchange.exporting import FORMATS, export, writer_of
from trimtab.exchange.gguf_model import TYPES, save_gguf
from trimtab.exchange.hub import Pulled, Pushed, card_of, fetched, pull, push
from trimtab.exchange.hub_search import Listing, search
from trimtab.exchange.importing import READERS, import_steering
from trimtab.exchange.lora import Needs, modules_at, needs
from trimtab.exchange.request import Exported, Request
from trimtab.exchange.sae_ts import Target
from trimtab.exchange.stripping import Stripped, strip
