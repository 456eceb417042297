"""Tokenise corpora of sound for audio language models: from one folder to a Ray cluster.

``records`` has what flows and the columns of the result; ``inputs`` lists what there is, ``reading`` decodes it and
``encoding`` turns windows into codes; ``local`` (processes, ``worker``) and ``cluster`` (Ray) are engines; ``shards``
commits, ``card`` describes and ``verify`` checks the result; ``run`` holds it all together.
"""

from .options import CorpusOptions
from .run import Progress, tokenize_corpus
from .verify import Report, verify_corpus

__all__ = ["CorpusOptions", "Progress", "Report", "tokenize_corpus", "verify_corpus"]
