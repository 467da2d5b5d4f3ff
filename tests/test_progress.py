"""The line on the terminal says how far an audit is, and how much is left while that is known."""

import re

from trap2.progress import audit_bar


def test_what_is_left_is_said_until_the_attacker_chooses(capsys):
    with audit_bar() as progress:
        progress.say("references")
        progress.tick()
        progress.expect(3)
        progress.say("grids")
        progress.note("something changed")
        progress.tick()
        progress.say("still grids")
        progress.tick()
        progress.tick()
        progress.say("its own choice")
    said = re.split(r"[\r\n]+", capsys.readouterr().err)
    shown = [line.strip() for line in said if line.strip()]
    assert "audit: references: 0 evaluations, 00:00" in shown
    assert any(
        re.fullmatch(r"audit: still grids: 2 of 3 or more evaluations, 00:00, .* or more to go", s)
        for s in shown
    )
    assert "audit: something changed" in shown
    assert shown[-1] == "audit: its own choice: 4 evaluations, 00:00"
