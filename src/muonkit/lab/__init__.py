"""The lab: compare optimizers on real data from the command line; what the extra ``lab`` brings.

Rooms: ``download`` and ``data`` (bytes to batches), ``models``, ``objective``, ``randomness`` (the
loss on a device, by seed and step), ``task`` and ``tasks`` (what is trained), ``own`` with
``loaders``, ``user`` and ``new_task`` (what is the user's own), ``optimizers`` (what trains it),
``store`` (what is kept on disk), ``train`` (one run), ``sweep`` (which learning rate), ``compare``
(all runs), ``results`` (what came out), ``pictures``, ``plots`` and ``report`` (what is shown),
``cli`` and ``specs`` (what is typed).
"""
