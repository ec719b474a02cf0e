"""The lab: compare optimizers on real data from the command line (``pip install "muonkit[lab]"``).

Rooms: ``download`` and ``data`` (bytes to batches), ``models``, ``tasks`` (what is trained),
``optimizers`` (what trains it), ``store`` (what is kept on disk), ``train`` (one run), ``sweep``
(which learning rate), ``compare`` (all runs), ``results`` (what came out), ``plots`` and ``report``
(what is shown), ``cli`` and ``specs`` (what is typed).
"""
