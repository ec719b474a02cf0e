"""What trainers need of muonkit beyond `MuonW(model)`, one file for each.

`transformers`, `accelerate`, `lightning`, `timm`; a trainer's package is imported by its file and
not before. Sinks of a `muonkit.Monitor` for trackers are in `muonkit.monitor.trackers`.
"""
