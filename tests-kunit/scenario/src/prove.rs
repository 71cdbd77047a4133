// SPDX-License-Identifier: GPL-2.0
pub fn list() {}
pub fn run(_: &crate::ctx::Setup, _: &str) -> anyhow::Result<()> {
    Ok(())
}
