"""How flows meet Prefect servers and work pools."""
