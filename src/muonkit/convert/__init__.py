"""Optimizer state of other Muons as ours, and ours as theirs, by parameter name.

::

    from muonkit import convert

    taken = convert.to_muonkit("torch", [muon_state, adamw_state], model, params=[hidden, rest])
    optimizer = taken.optimizer  # goes on as torch's two would have
    print(taken)  # what was not carried

    back = convert.from_muonkit("torch", optimizer)
    muon = torch.optim.Muon(back.param_groups[0])
    muon.load_state_dict(back.state_dicts[0])

The formats:

- "torch": `torch.optim.Muon` and `torch.optim.AdamW`;
- "keller": every class of Keller Jordan's muon.py, and torch's AdamW beside it; "keller_2024": what
  that file was until January 2025, to read alone;
- "moonlight": the class of Moonlight's toy_train.py;
- "dion": `Muon` and `NorMuon` of microsoft/dion.
"""

from muonkit.convert.converter import Exported, Imported, from_muonkit, joined, to_muonkit
from muonkit.convert.formats import FORMATS

__all__ = ["FORMATS", "Exported", "Imported", "from_muonkit", "joined", "to_muonkit"]
