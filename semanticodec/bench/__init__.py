"""Compare codecs at measured bits: ``semanticodec bench`` (needs ``semanticodec[bench]``).

* :mod:`.clips`: recordings with their kinds, transcripts and labels
* :mod:`.codecs`, :mod:`.commands`, :mod:`.neural`: everything that codes a clip, behind one small adapter
* :mod:`.align`, :mod:`.metrics`: what is measured, on equal footing
* :mod:`.run`: every (codec, clip, metric) once, cached by content, in several processes
* :mod:`.results`, :mod:`.statistics`: what came out, with intervals and paired tests
* :mod:`.cost`, :mod:`.probe`, :mod:`.losses`: memory, operations and latency; what codes tell; lost blocks
* :mod:`.figures`, :mod:`.report`, :mod:`.leaderboard`, :mod:`.listening`: how it is shown, and listening tests
"""
