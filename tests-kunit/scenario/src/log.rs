// SPDX-License-Identifier: GPL-2.0

//! The kernel's log.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};

use crate::ctx::Ctx;

/// What the kernel says from some moment on.
pub struct Log {
    file: File,
    record: Vec<u8>,
}

impl Log {
    /// From now on.
    pub fn from_now() -> Result<Log> {
        let mut file = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")
            .context("open /dev/kmsg")?;
        file.seek(SeekFrom::End(0)).context("seek in /dev/kmsg")?;
        Ok(Log {
            file,
            record: vec![0; 8192],
        })
    }

    /// Reads on until a line has all of these words, or there is none any more.
    fn reads(&mut self, words: &[&str]) -> Result<bool> {
        loop {
            match self.file.read(&mut self.record) {
                Ok(n) => {
                    let line = String::from_utf8_lossy(&self.record[..n]);
                    if words.iter().all(|word| line.contains(word)) {
                        return Ok(true);
                    }
                }
                // Records were overwritten meanwhile: go on with the oldest there is.
                Err(e) if e.raw_os_error() == Some(libc::EPIPE) => {}
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => return Ok(false),
                Err(e) => return Err(e).context("read /dev/kmsg"),
            }
        }
    }
}

/// `refused` has the module say a line with these words, at the latest when it may say one again (20
/// in five seconds).
pub fn is_logged(ctx: &Ctx, words: &[&str], mut refused: impl FnMut() -> Result<()>) -> Result<()> {
    let words = [&["thinram"], words].concat();
    let mut log = Log::from_now()?;
    ctx.until(&format!("a line in the log with {words:?}"), 15.0, || {
        refused()?;
        Ok((log.reads(&words)?, "none".to_owned()))
    })
}
