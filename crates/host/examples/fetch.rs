//! Fetches and unpacks one package from the registry npm would use here: `fetch NAME VERSION DIRECTORY`.

use host::clock::Deadline;
use host::registry::Registry;
use host::unpack::{UnpackLimits, unpack_tgz};
use std::path::Path;
use std::time::Duration;

#[allow(clippy::print_stdout)]
fn main() -> host::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage =
        || host::Error::new(host::Kind::Usage, "reading the arguments", "fetch NAME VERSION [DIRECTORY]");
    let [name, version, rest @ ..] = args.as_slice() else { return Err(usage()) };
    let home = std::env::var_os("HOME");
    let deadline = Deadline::after(Duration::from_secs(120));
    let registry = Registry::from_env(home.as_deref().map(Path::new), &[])?;
    let began = host::clock::now();
    let package = registry.resolve(name, version, deadline)?;
    let took = |since| host::clock::now().since_ms(since).unwrap_or(0);
    println!("{} from {} in {} ms: {package:#?}", package.version, registry.address(name), took(began));
    let Some(folder) = rest.first().map(Path::new) else { return Ok(()) };
    let file = folder.with_extension("tgz");
    let (began, mut most) = (host::clock::now(), (0, 0));
    registry.download(&package, &file, &mut |done, total| most = (done, total), deadline)?;
    println!("{} of {} bytes in {} ms", most.0, most.1, took(began));
    let began = host::clock::now();
    let unpacked = unpack_tgz(&file, folder, 1, UnpackLimits::default(), &mut |_, _| {})?;
    println!("{unpacked:?} in {} ms", took(began));
    Ok(())
}
