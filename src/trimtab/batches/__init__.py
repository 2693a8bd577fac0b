"""Files of prompts, each row under steerings of its own, into files that grow row by row"""

from trimtab.batches.generating import Generated, generate_file, seed_of
from trimtab.batches.rows import Row, read_rows
