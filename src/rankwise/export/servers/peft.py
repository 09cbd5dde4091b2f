"""Stock PEFT."""

from __future__ import annotations

from rankwise.export.servers import rules
from rankwise.export.servers.base import Server


class PEFT(Server):
    """Loads its own folders, of any layout and kind."""

    name = "peft"
    start_command = 'PeftModel.from_pretrained(base, "{folder}")'
    rules = rules.OF_PEFT_FOLDERS
