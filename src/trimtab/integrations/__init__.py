"""trimtab's methods in other libraries: `import trimtab.integrations.peft` (and the like) registers them."""
