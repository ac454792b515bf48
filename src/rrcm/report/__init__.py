"""Tables and figures from certification results."""
