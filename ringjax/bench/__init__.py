"""`ringjax bench`: times attention beside the best of what else can be installed."""
