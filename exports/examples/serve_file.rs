//! Serves a raw file over NBD on a unix socket, without graph or formats: the cost of the server
//! alone. `serve_file FILE SOCKET [THREADS [direct]]`; the export is named "x".

use gipfel_base::{ByteRange, Error, Result};
use gipfel_exports::nbd::{Disk, ExportOptions, Extent, Server, ServerOptions, ZeroFlags};
use gipfel_io::net::Listener;
use gipfel_io::{Buf, File, OpenOptions, Runtime, ZeroMode};
use std::path::Path;
use std::sync::Arc;

struct FileDisk {
    file: File,
    size: u64,
    align: u32,
}

impl Disk for FileDisk {
    fn size(&self) -> u64 {
        self.size
    }

    fn min_block(&self) -> u32 {
        self.align
    }

    async fn read(&self, offset: u64, buf: Buf) -> Result<()> {
        self.file.read_at(offset, buf).await
    }

    async fn write(&self, offset: u64, buf: Buf, fua: bool) -> Result<()> {
        self.file.write_at(offset, buf).await?;
        if fua { self.file.sync().await } else { Ok(()) }
    }

    async fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> Result<()> {
        let mode = if flags.may_unmap { ZeroMode::Unmap } else { ZeroMode::Keep };
        self.file.zero(range, mode).await?;
        if flags.fua { self.file.sync().await } else { Ok(()) }
    }

    async fn discard(&self, range: ByteRange, fua: bool) -> Result<()> {
        self.write_zeroes(range, ZeroFlags { fua, may_unmap: true, fast: true }).await
    }

    async fn flush(&self) -> Result<()> {
        self.file.sync().await
    }

    async fn prefetch(&self, _: ByteRange) -> Result<()> {
        Ok(())
    }

    async fn block_status(&self, range: ByteRange) -> Result<Extent> {
        let (data, end) = self.file.extent(range.start()).await?;
        let len = end.min(range.end()) - range.start();
        Ok(Extent { len, allocated: data, zero: !data })
    }
}

async fn serve(file: &str, socket: &str, direct: bool, runtime: &Runtime) -> Result<()> {
    let options = OpenOptions { write: true, direct, ..OpenOptions::default() };
    let file = File::open(Path::new(file), options).await?;
    let info = file.info().await?;
    let disk = FileDisk { file, size: info.len, align: info.offset_align };
    let server = Server::new(runtime.io_threads(), ServerOptions::default());
    let export = ExportOptions { name: "x".into(), writable: true, ..ExportOptions::default() };
    server.add(export, Arc::new(disk))?;
    server.listen(Listener::unix(Path::new(socket)).await?);
    std::future::pending().await
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, socket, rest @ ..] = &args[..] else {
        return Err(Error::invalid("usage: serve_file FILE SOCKET [THREADS [direct]]"));
    };
    let threads = rest.first().map_or(Ok(1), |t| t.parse());
    let threads = threads.map_err(|_| Error::invalid("THREADS is a number"))?;
    let runtime = Runtime::new(threads)?;
    let direct = rest.get(1).is_some_and(|d| d == "direct");
    runtime.block_on(serve(file, socket, direct, &runtime))?
}
