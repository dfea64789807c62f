//! Against archives made on the spot, honest and hostile.

use super::*;
use tar::EntryType;

/// One entry of an archive, written without any of the writer's own checks.
fn entry(kind: EntryType, name: &[u8], link: &[u8], mode: u32, content: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    let raw = header.as_old_mut();
    raw.name[..name.len()].copy_from_slice(name);
    raw.linkname[..link.len()].copy_from_slice(link);
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend_from_slice(content);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(name: &str, content: &str) -> Vec<u8> {
    entry(EntryType::Regular, name.as_bytes(), b"", 0o644, content.as_bytes())
}

fn link(kind: EntryType, name: &str, target: &str) -> Vec<u8> {
    entry(kind, name.as_bytes(), target.as_bytes(), 0o777, b"")
}

fn tgz(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(&entries.concat()).unwrap();
    gz.write_all(&[0; 1024]).unwrap();
    gz.finish().unwrap()
}

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench { dir: tempfile::tempdir().unwrap() }
    }

    fn dest(&self) -> PathBuf {
        self.dir.path().join("deep/dest")
    }

    fn unpack(&self, archive: &[u8], limits: UnpackLimits) -> Result<Unpacked> {
        let from = self.dir.path().join("a.tgz");
        std::fs::write(&from, archive).unwrap();
        unpack_tgz(&from, &self.dest(), 1, limits, &mut |_, _| {})
    }
}

fn mode(path: &Path) -> u32 {
    path.symlink_metadata().unwrap().permissions().mode() & 0o7777
}

#[test]
fn an_old_npms_archive_that_says_every_size_twice() {
    let bench = Bench::new();
    let pax = |record: &[u8]| entry(EntryType::XHeader, b"PaxHeader/x", b"", 0o644, record);
    let done = bench.unpack(&tgz(&[pax(b"10 size=3\n"), file("package/x", "abc")]), UnpackLimits::default());
    assert_eq!(done.unwrap().bytes, 3);
}

#[test]
fn one_file_is_read_out_of_an_archive() {
    let archive = tgz(&[file("package/a.json", "no"), file("package/./package.json", "{}")]);
    let read = |path: &str, most| read_file(Path::new("a"), archive.as_slice(), Path::new(path), most);
    assert_eq!(read("package.json", 2).unwrap(), b"{}");
    assert_eq!(read("package.json", 1).unwrap_err().kind, Kind::Corrupt);
    assert_eq!(read("other.json", 9).unwrap_err().kind, Kind::NotFound);
}

#[test]
fn an_honest_package() {
    let bench = Bench::new();
    let archive = tgz(&[
        entry(EntryType::XGlobalHeader, b"pax_global_header", b"", 0o644, b"20 comment=whatever\n"),
        file("package/package.json", "{}"),
        entry(EntryType::Regular, b"package/bin/node", b"", 0o4711, b"ELF"),
        entry(EntryType::Directory, b"package/empty/", b"", 0o700, b""),
        link(EntryType::Symlink, "package/bin/npm", "../lib/cli.js"),
        file("package/lib/cli.js", "cli"),
        link(EntryType::Link, "package/lib/twin.js", "package/lib/cli.js"),
        file("package/package.json", "{\"second\":1}"),
    ]);
    let mut last = (0, 0);
    let from = bench.dir.path().join("a.tgz");
    std::fs::write(&from, archive).unwrap();
    let done =
        unpack_tgz(&from, &bench.dest(), 1, UnpackLimits::default(), &mut |f, b| last = (f, b)).unwrap();
    assert_eq!((done.files, done.bytes), last);
    assert_eq!(done.files, 6);
    let at = |p: &str| bench.dest().join(p);
    assert_eq!(
        std::fs::read_to_string(at("package.json")).unwrap(),
        "{\"second\":1}",
        "the later entry wins"
    );
    assert_eq!(mode(&at("package.json")), 0o644);
    assert_eq!(mode(&at("bin/node")), 0o755, "executable, and no set-user-id");
    assert_eq!(mode(&at("bin")), 0o755);
    assert!(at("empty").is_dir());
    assert_eq!(std::fs::read_to_string(at("bin/npm")).unwrap(), "cli");
    assert_eq!(std::fs::read_to_string(at("lib/twin.js")).unwrap(), "cli");
}

#[test]
fn long_names_of_both_dialects() {
    let bench = Bench::new();
    let name = format!("package/{}/f.js", "d".repeat(120));
    let record = |key: &str, value: &str| {
        let body = format!(" {key}={value}\n");
        let mut length = body.len();
        while length != body.len() + length.to_string().len() {
            length = body.len() + length.to_string().len();
        }
        format!("{length}{body}")
    };
    let archive = tgz(&[
        entry(EntryType::XHeader, b"x", b"", 0, record("path", &name).as_bytes()),
        file("package/cut", "pax"),
        entry(EntryType::GNULongName, b"././@LongLink", b"", 0, format!("{name}.gnu\0").as_bytes()),
        file("package/cut", "gnu"),
        file("package/short", "short"),
    ]);
    assert_eq!(bench.unpack(&archive, UnpackLimits::default()).unwrap().files, 3);
    let below = bench.dest().join("d".repeat(120));
    assert_eq!(std::fs::read_to_string(below.join("f.js")).unwrap(), "pax");
    assert_eq!(std::fs::read_to_string(below.join("f.js.gnu")).unwrap(), "gnu");
    assert!(bench.dest().join("short").is_file(), "a long name is for one entry only");
}

#[test]
fn hostile_archives_write_nothing() {
    let s = |name: &str, to: &str| link(EntryType::Symlink, name, to);
    let hard = |name: &str, to: &str| link(EntryType::Link, name, to);
    let pax = |text: &[u8]| entry(EntryType::XHeader, b"x", b"", 0, text);
    let cases: Vec<(&str, Vec<Vec<u8>>)> = vec![
        ("absolute", vec![file("/etc/evil", "x")]),
        ("absolute by pax", vec![pax(b"18 path=/tmp/evil\n"), file("package/x", "x")]),
        ("upwards", vec![file("package/../../evil", "x")]),
        ("upwards after stripping", vec![file("package/a/../../../evil", "x")]),
        ("link out", vec![s("package/l", "../evil")]),
        ("link out, deeper", vec![s("package/a/l", "../../evil")]),
        ("absolute link", vec![s("package/l", "/etc")]),
        ("link climbing late", vec![s("package/a/b", "c/../../../evil")]),
        ("link climbing through another", vec![s("package/d/k", "."), s("package/d/l", "k/../../evil")]),
        ("empty link", vec![s("package/l", "")]),
        ("through a link", vec![s("package/l", "."), file("package/l/x", "x")]),
        (
            "a directory over a link",
            vec![s("package/l", "."), entry(EntryType::Directory, b"package/l", b"", 0, b"")],
        ),
        ("hard link out", vec![hard("package/h", "package/../../evil")]),
        ("hard link to nothing", vec![hard("package/h", "package/none")]),
        ("hard link to itself", vec![file("package/h", "x"), hard("package/h", "package/h")]),
        (
            "hard link through a link",
            vec![file("package/d/x", "x"), s("package/l", "d"), hard("package/h", "package/l/x")],
        ),
        ("device", vec![entry(EntryType::Char, b"package/dev", b"", 0o666, b"")]),
        ("fifo", vec![entry(EntryType::Fifo, b"package/fifo", b"", 0o666, b"")]),
        ("sparse", vec![entry(EntryType::GNUSparse, b"package/sparse", b"", 0o666, b"")]),
        ("size by pax", vec![pax(b"22 size=99999999999999\n"), file("package/x", "x")]),
        ("giant name", vec![pax(&vec![b'x'; 70_000]), file("package/x", "x")]),
        ("a file over a directory", vec![file("package/d/x", "x"), file("package/d", "x")]),
        (
            "deep",
            vec![
                file(&"d/".repeat(45), ""),
                pax(format!("{} path={}\n", 10 + 400, "d/".repeat(200)).as_bytes()),
                file("x", "x"),
            ],
        ),
        ("nothing", vec![]),
        ("no tar", vec![vec![b'x'; 1024]]),
    ];
    for (name, entries) in cases {
        let bench = Bench::new();
        let mut all = vec![file("package/first", "first")];
        if name != "nothing" {
            all.extend(entries);
        } else {
            all.clear();
        }
        let e = bench.unpack(&tgz(&all), UnpackLimits::default()).expect_err(name);
        assert!(matches!(e.kind, Kind::Corrupt | Kind::System), "{name}: {e}");
        assert!(!bench.dest().exists(), "{name}: left something behind");
        assert!(
            !bench.dir.path().join("deep/evil").exists() && !bench.dir.path().join("evil").exists(),
            "{name}"
        );
    }
}

#[test]
fn limits_hold() {
    let archive = tgz(&[file("package/a", "12345"), file("package/b", "12345")]);
    for (limits, fits) in [
        (UnpackLimits { files: 2, bytes: 10 }, true),
        (UnpackLimits { files: 1, bytes: 10 }, false),
        (UnpackLimits { files: 2, bytes: 9 }, false),
    ] {
        let bench = Bench::new();
        assert_eq!(bench.unpack(&archive, limits).is_ok(), fits, "{limits:?}");
        assert_eq!(bench.dest().exists(), fits);
    }
}

#[test]
fn a_cut_or_rotten_archive_leaves_nothing() {
    let noise: String =
        (0..4_000_u32).map(|i| char::from(33 + (i.wrapping_mul(2_654_435_761) >> 24) as u8 % 90)).collect();
    let whole = tgz(&[file("package/a", &noise)]);
    let mut rotten = whole.clone();
    let crc = rotten.len() - 8;
    rotten[crc] ^= 1;
    let cuts = [10, whole.len() / 2, whole.len() - 9, whole.len() - 1].map(|n| whole[..n].to_vec());
    for archive in cuts.into_iter().chain([rotten]) {
        let bench = Bench::new();
        bench.unpack(&archive, UnpackLimits::default()).unwrap_err();
        assert!(!bench.dest().exists());
    }
    Bench::new().unpack(&whole, UnpackLimits::default()).unwrap();
}

#[test]
fn a_directory_in_use_is_left_alone() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.dest()).unwrap();
    std::fs::write(bench.dest().join("mine"), "mine").unwrap();
    let e = bench.unpack(&tgz(&[file("package/a", "a")]), UnpackLimits::default()).unwrap_err();
    assert_eq!(e.kind, Kind::Usage);
    assert_eq!(std::fs::read_to_string(bench.dest().join("mine")).unwrap(), "mine");
    let bench = Bench::new();
    std::fs::create_dir_all(bench.dest()).unwrap();
    bench.unpack(&tgz(&[file("/a", "a")]), UnpackLimits::default()).unwrap_err();
    assert_eq!(std::fs::read_dir(bench.dest()).unwrap().count(), 0, "an empty one given stays, empty");
}
