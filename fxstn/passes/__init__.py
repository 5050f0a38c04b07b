"""Passes: functions (GraphModule, Plan) → GraphModule, in the order of `fxstn.transform`. A new pass gets a file here."""
