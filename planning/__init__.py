"""What more devices would give: predicted from a run on one, a link and the formulas of docs/scaling.md."""
